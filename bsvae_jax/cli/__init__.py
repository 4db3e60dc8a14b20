"""The command line, `bsvae`.

Begin with `main`, which finds the command and turns errors into sentences and exit statuses. Every command has a file, imported
only when it is given; `options` has what several of them share, `experiment` the options of those that take a config file. What
a process is handed by its user (terminal, streams, platforms) is made fit in `environment`.
"""
