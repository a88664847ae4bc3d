"""The options, and the parser for YAML files and command-line flags."""
