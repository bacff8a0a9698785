"""The README's commands are the ones that work: CI runs its test command, its options exist, its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from exporter.cli import _parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def stm_commands():
    """Every `stm ...` or `stm-export ...` line of a shell block."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    found = [re.sub(r"^(\.venv/bin/)", "", part).partition("#")[0].strip() for part in parts if re.match(r"(\.venv/bin/)?stm(-export)? ", part)]
    assert len(found) >= 4
    return found


@pytest.mark.parametrize("command", stm_commands())
def test_every_command_parses(command):
    program, *arguments = shlex.split(command)
    parser = _parser("export") if program == "stm-export" else _parser()
    parser.parse_args(arguments)


def test_ci_runs_the_readme_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    assert "test command" in script
    assert re.search(r"<!-- test command -->\n```bash\n.*pytest.*\n```", README)


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
