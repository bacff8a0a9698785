"""The README's commands are the ones that work: CI runs its test command, its options exist, its links lead somewhere."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

import stm
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


def test_ci_runs_the_readme_test_command(tmp_path):
    """The script on a copy of the README whose command only leaves a mark."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_bytes((ROOT / ".ci" / "run").read_bytes())
    command = re.search(r"<!-- test command -->\n```bash\n(.*)\n```", README)
    assert command
    assert command.group(1).endswith(".venv/bin/python -m pytest -q")
    (tmp_path / "README.md").write_text(README.replace(command.group(1), "echo ran > mark"))
    subprocess.run(["bash", str(tmp_path / ".ci" / "run")], check=True, capture_output=True)
    assert (tmp_path / "mark").read_text() == "ran\n"


def test_flops_table_is_what_the_code_counts():
    rows = re.findall(r"^\| (none|stm-\d+) \| (\d+) \| (\d+) \| ([\d. /]+) \| ([\d. /]+) \|$", README, re.M)
    assert len(rows) == 5
    for name, left, removed, *figures in rows:
        for index, model in enumerate(("vim-t", "vim-s", "vim-b")):
            config = stm.model_config(model)
            plan = stm.make_plan(config) if name == "none" else stm.make_plan(config, preset=name)
            assert (plan.tokens_left, plan.token_layers_removed) == (int(left), int(removed))
            printed = [figure.split(" / ")[index].strip() for figure in figures]
            assert printed == [f"{stm.gflops_paper(config, plan):.3f}", f"{stm.gflops_true(config, plan):.3f}"], (name, model)


def test_linked_files_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
