"""How good a model is on held-out rows, and whether it got better.

text.py      a prediction and its reference -> scores
compare.py   two scores of each row -> the difference, its interval, rows won and lost
run.py       a model and conversations -> Scores; two Scores -> Comparison; the gate
show.py      scores and comparisons as a terminal's table or as plain lines
facts.py     a run in words: what is trained, how long it takes, what to do next
report.py    a run's folder -> report.html; report.jinja is the page, chart.py draws its curves
"""
