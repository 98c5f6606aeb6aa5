"""``llmkern doctor``."""

from __future__ import annotations

import click

from llmkern.commands import CONTEXT, common


@click.command("doctor", context_settings=CONTEXT)
@common.as_json
@common.debug
def command(as_json: bool, debug: bool) -> None:
    """Say what works on this machine and what to do about the rest."""
    from llmkern.doctor import examine, print_findings

    found = examine()
    if as_json:
        from dataclasses import asdict

        from llmkern.report.document import SCHEMA, echo

        echo({"schema": SCHEMA, "document": "doctor", "findings": [asdict(finding) for finding in found]})
    else:
        print_findings(found, common.console())
