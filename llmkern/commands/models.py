"""``llmkern models``."""

from __future__ import annotations

import click

from llmkern.commands import CONTEXT, common


@click.command("models", context_settings=CONTEXT)
@common.as_json
def command(as_json: bool) -> None:
    """List the models that --model knows by name."""
    from rich.table import Table

    from llmkern.workload.models import REGISTRY

    if as_json:
        from llmkern.report.document import SCHEMA, echo

        rows = [
            {"name": s.name, "parameters": s.parameters, "hub_id": s.hub_id, "aliases": list(s.aliases)}
            for s in REGISTRY.values()
        ]
        echo({"schema": SCHEMA, "document": "models", "models": rows})
        return
    table = Table(box=None, pad_edge=False)
    for title in ("name", "parameters", "Hugging Face id", "also called"):
        table.add_column(title, justify="right" if title == "parameters" else "left")
    for spec in REGISTRY.values():
        table.add_row(spec.name, f"{spec.parameters / 1e9:.2f} B", spec.hub_id or "–", ", ".join(spec.aliases))
    common.console().print(table)
