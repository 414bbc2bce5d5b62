"""The command line: parse, call, print.

app.py        main(): finds the command, runs it, turns errors into messages and exit codes
progress.py   how a run is told in a terminal and in a pipe
one file for each command or few commands that belong together
"""
