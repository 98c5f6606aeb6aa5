"""The two lines that say which run a report is of."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from llmkern.text import quantity


def heading(facts: dict[str, Any]) -> list[Text]:
    """Return the workload, and the device with the libraries, of a run's *facts*."""
    options, model, device = facts["options"], facts.get("model", {}), facts["device"]
    prompts = facts.get("prompts", {})
    versions = facts["versions"]
    engine = f", {options['engine']} engine" if options.get("engine", "eager") != "eager" else ""
    driver = f", driver {device['driver_version']}" if device.get("driver_version") else ""
    libraries = ", ".join(f"{k} {versions[k]}" for k in ("torch", "transformers", "bitsandbytes") if versions.get(k))
    weights = f"{model['weights']} weights, {quantity(model['weight_bytes'], 'B')}" if model else "weights not loaded"
    if "imported" in facts:
        source = facts["imported"]
        schema = f", schema {source['schema']}" if source.get("schema") else ""
        of = f", with the energy of {facts['energy_of']}" if facts.get("energy_of") else ""
        first = Text(f"{source['file']}: {source['format']}{schema}{of}", style="bold")
        return [first, Text(f"{device['name']}{driver}; {facts['started']}", style="dim")]
    return [
        Text(
            f"{model.get('name', options['model'])} {options['precision']}{engine}: batch {options['batch']}, "
            f"{prompts.get('tokens', '?')} prompt tokens, {options['new_tokens']} new tokens, {weights}",
            style="bold",
        ),
        Text(f"{device['name']}{driver}; {libraries}; {facts['started']}", style="dim"),
    ]
