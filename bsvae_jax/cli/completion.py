"""`bsvae completion`: what the tab key does."""

import contextlib
import io
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from bsvae_jax.cli.options import command_of


def completion(shell: Annotated[Positional[Literal["bash", "zsh", "fish"]], tyro.conf.arg(metavar="SHELL")]) -> None:
    """Print a script by which a shell completes commands, options and their choices.

    bash: bsvae completion bash > ~/.local/share/bash-completion/completions/bsvae
    zsh:  bsvae completion zsh > FOLDER/_bsvae, for a FOLDER of $fpath
    fish: bsvae completion fish > ~/.config/fish/completions/bsvae.fish

    The options are those of the library's own classes; it takes some seconds, and must be repeated after an update.

    Args:
      shell: Of which the script is.
    """
    from bsvae_jax.cli.main import COMMANDS

    commands = {name: command_of(name, ["--help"]) for name in COMMANDS}
    script = io.StringIO()
    try:
        with contextlib.redirect_stdout(script):
            tyro.extras.subcommand_cli_from_dict(commands, prog="bsvae", args=["--tyro-write-completion", shell, "-"])
    except SystemExit as stop:  # which is how tyro ends, with a script or without
        if stop.code:
            raise
    # The script takes every line for a completion, and descriptions have several.
    said = script.getvalue().replace("print(completion)", "print(completion.replace(chr(10), chr(32)))")
    # Where it has nothing to say, bash's own completion names files.
    print(said.replace("complete -F ", "complete -o default -F "))
