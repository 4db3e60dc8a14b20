"""The commands of `bsvae`: which there are, and what becomes of the errors they raise. Options are parsed by tyro."""

import argparse
import errno
import gc
import logging
import sys
from collections.abc import Sequence
from typing import NoReturn

from bsvae_jax import __version__
from bsvae_jax.cli.environment import commandline_environment, expand_user, lose_standard_output
from bsvae_jax.distributed.preemption import Interrupted
from bsvae_jax.errors import BsvaeError

COMMANDS = {
    "train": "Train the experiment of a config file; run it again to continue where it stopped.",
    "sweep": "Train a grid of experiments as few compiled programs, and write their report.",
    "report": "Write the table, the figures and the page of a sweep from what has finished so far.",
    "runs": "List the runs and sweeps below a folder: how far each has come, and its numbers.",
    "compare": "Print the configs and numbers of runs side by side, and draw them.",
    "evaluate": "Evaluate a trained run, or every finished member of a sweep.",
    "sample": "Draw images from a trained run.",
    "fit-prior": "Fit a density to the latents of a trained run.",
    "prepare": "Decode a set of images once, into a memory map that training reads.",
    "import-torch": "Make a run of weights of the paper's PyTorch network.",
    "export": "Write a run for other programs: its weights, its networks, or a folder for a model hub.",
    "compile": "Compile the programs of a config for a machine, which need not be there.",
    "cache": "List what is kept between commands, and remove it.",
    "bench": "Measure how fast a config trains on the devices at hand.",
    "completion": "Print a script by which a shell completes commands and options with the tab key.",
}
"""The commands, whose functions are in files of the same names, and what `bsvae --help` says of each."""

_LESS_MEMORY = "A smaller batch_size or network needs less."


def _command(arguments: Sequence[str]) -> str:
    """The command that is asked for. `bsvae --help`, `bsvae --version` and a command that does not exist end here."""
    parser = argparse.ArgumentParser(
        prog="bsvae",
        description="Gaussian VAEs with their decoder variance treated properly.",
        epilog="bsvae COMMAND --help shows the options of a command. With --json, where it has it, it prints one JSON document "
        "and nothing else, on standard output. The tab key: bsvae completion --help.",
    )
    parser.add_argument("--version", action="version", version=f"bsvae {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", required=True)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser.parse_args(arguments[:1]).command


def _run(arguments: list[str]) -> None:
    name = _command(arguments)
    # Only the file of the command is imported: `bsvae --help` and a wrong option are answered without JAX where they can be.
    from bsvae_jax._io.terminal import messages_shown

    with messages_shown():
        gc.disable()  # nothing of what is imported is garbage, and looking for it takes a tenth of the time
        try:
            from bsvae_jax.cli.options import read_options

            command = read_options(name, arguments[1:])
        finally:
            gc.enable()
        command()
    sys.stdout.flush()


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def _first_line(error: Exception) -> str:
    """What the compiler or the allocator says, with the size asked for."""
    return str(error).strip().split("\n")[0][:300].rstrip(".")


def _quiet_event_loops() -> None:
    """Leave the rest of a failed save unsaid.

    Of a save that fails, Orbax closes its event loop before all of TensorStore's threads have told it so; what is left of them
    complains on stderr, a dozen times, beside the sentence in which the failure is reported.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    complain = sys.unraisablehook
    sys.unraisablehook = lambda error: None if str(error.exc_value) == "Event loop is closed" else complain(error)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Exit status 2: the message says what was wrong; 130 and 143: stopped by SIGINT or SIGTERM, the same command continues.
    """
    hook = sys.unraisablehook
    try:
        with commandline_environment():
            _quiet_event_loops()
            _run(expand_user(sys.argv[1:] if arguments is None else arguments))
    except BsvaeError as error:
        _refuse(str(error))
    except BrokenPipeError:  # `bsvae report RUN | head` has seen enough
        lose_standard_output()
        sys.exit(1)
    except OSError as error:  # its text names the file
        _refuse(f"{error}. Free some space and repeat the command; it continues" if error.errno == errno.ENOSPC else str(error))
    except MemoryError as error:
        _refuse(f"out of memory ({error}). {_LESS_MEMORY}")
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _refuse(f"out of device memory: {_first_line(error)}. {_LESS_MEMORY}")
    except Interrupted as error:
        print(f"\n{error}; the same command continues there", file=sys.stderr)
        sys.exit(128 + error.number)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues from what is saved", file=sys.stderr)
        sys.exit(130)
    finally:
        sys.unraisablehook = hook
