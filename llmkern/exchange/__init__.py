"""Runs out to the tools that kernel developers use already, and captures of those tools in as run folders."""
