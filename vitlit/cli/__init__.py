"""The command line: `vitlit COMMAND ...`, one small file a command."""
