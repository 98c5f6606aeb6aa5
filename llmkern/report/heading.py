"""The two lines that say which run a report is of."""

from __future__ import annotations

from rich.text import Text

from llmkern.runfolder.facts import RunFacts
from llmkern.text import quantity


def called(facts: RunFacts) -> str:
    """Return what was run: model, precision, and the engine where it is not the usual one."""
    options = facts.options
    name = facts.model.name if facts.model is not None else options.model
    engine = f", {options.engine} engine" if options.engine != "eager" else ""
    return f"{name} {options.precision}{engine}".strip()


def heading(facts: RunFacts) -> list[Text]:
    """Return the workload, and the device with the libraries, of a run's *facts*."""
    options, model, device, prompts = facts.options, facts.model, facts.device, facts.prompts
    driver = f", driver {device.driver_version}" if device.driver_version else ""
    if facts.imported is not None:
        source = facts.imported
        schema = f", schema {source.schema}" if source.schema else ""
        of = f", with the energy of {facts.energy_of}" if facts.energy_of else ""
        first = Text(f"{source.file}: {source.format}{schema}{of}", style="bold")
        return [first, Text(f"{device.name}{driver}; {facts.started}", style="dim")]
    libraries = (
        f"{name} {facts.versions[name]}"
        for name in ("torch", "transformers", "bitsandbytes")
        if facts.versions.get(name)
    )
    weights = (
        f"{model.weights} weights, {quantity(model.weight_bytes, 'B')}" if model is not None else "weights not loaded"
    )
    tokens = prompts.tokens if prompts is not None else "?"
    return [
        Text(
            f"{called(facts)}: batch {options.batch}, {tokens} prompt tokens, {options.new_tokens} "
            f"new tokens, {weights}",
            style="bold",
        ),
        Text(
            "; ".join(part for part in (f"{device.name}{driver}", ", ".join(libraries), facts.started) if part),
            style="dim",
        ),
    ]
