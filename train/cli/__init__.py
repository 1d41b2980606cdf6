"""Command-line tools: parsing of options, presets, plugins, and one-line error messages."""
