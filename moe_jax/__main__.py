"""The console command `moe-jax COMMAND …`, also `python -m moe_jax COMMAND …`."""

import importlib

from moe_jax.base.startup import ask_for_huge_pages

COMMANDS = {
    "train": "trains a model, and continues a run that was interrupted",
    "complete": "continues a text with a trained model, within a budget for its experts",
    "inspect-runs": "compares runs in the terminal and as one HTML page",
    "sweep": "searches for the best settings of a run",
    "teacher-text": "has a teacher write text that a student can learn from",
}
"""name -> what it does. The body is `main` of moe_jax/commands/NAME.py."""


def run(*words: str) -> None:
    """The whole program, with `words` before the arguments of this process."""
    ask_for_huge_pages()
    from moe_jax.cli import program  # only now, because the process may have just restarted

    program(lambda argv: dispatch([*words, *argv]))


def dispatch(argv: list[str]) -> None:
    """`COMMAND …`. Without arguments or with --help it lists the commands.

    UserError: there is no such command.
    """
    from moe_jax import __version__
    from moe_jax.base.errors import UserError, near_name, quote

    name, *rest = argv or ["--help"]
    if name in COMMANDS:
        body = importlib.import_module(f"moe_jax.commands.{name.replace('-', '_')}")
        body.main(rest)
    elif name in ("-h", "--help"):
        print("usage: moe-jax COMMAND [OPTIONS]\n")
        for command, job in COMMANDS.items():
            print(f"  {command:14}{job}")
        print("\nmoe-jax COMMAND --help lists the options of a command.")
    elif name == "--version":
        print(f"moe_jax {__version__}")
    else:
        near = near_name(name, COMMANDS)
        raise UserError(f"unknown command {quote(name)}: use one of {', '.join(COMMANDS)}{near}")


if __name__ == "__main__":
    run()
