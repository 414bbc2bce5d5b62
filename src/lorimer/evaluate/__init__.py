"""How good a model is on held-out rows, and whether it got better.

text.py      a prediction and its reference -> scores
compare.py   two scores of each row -> the difference, its interval, rows won and lost
run.py       a model and conversations -> Scores; two Scores -> Comparison; the gate
show.py      scores and comparisons as a terminal's table or as plain lines
"""
