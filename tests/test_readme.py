"""The README says what was measured, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import click

from bench.tables import PAGES, filled
from llmkern.commands import cli, command

ROOT = Path(__file__).parents[1]


def test_the_tables_are_those_of_the_results() -> None:
    for page in PAGES:
        text = page.read_text()
        assert filled(text) == text, "run 'python -m bench.tables --write'"


def test_its_make_targets_and_commands_exist() -> None:
    text = PAGES[0].read_text()
    commands = {name: command(name) for name in cli.list_commands(click.Context(cli))}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", text, flags=re.MULTILINE)) == {"run", "test"}
    assert {"run", "test", "help"} <= targets
    assert set(re.findall(r"^llmkern (\w+)", text, flags=re.MULTILINE)) <= set(commands)
    options = {o for one in commands.values() for p in one.params for o in p.opts}
    assert set(re.findall(r"`(--[a-z-]+)", text)) <= options


def test_no_path_of_a_machine_is_in_a_result() -> None:
    for file in [*(ROOT / "bench" / "results").iterdir(), *(ROOT / "tests" / "data").glob("*/run.json")]:
        absolute = re.findall(r"(?:^|[\s\"'=])(/\w[^\s\"']*)", file.read_text())
        assert not absolute, f"{file.name} names {absolute}"
