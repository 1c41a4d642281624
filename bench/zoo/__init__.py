"""The zoo: every architecture that the project claims to cover, checked one by one.

catalogue   names and builders of the models (random weights, nothing is downloaded)
check       all checks of one model, in one process; prints a JSON record
run         checks of many models, one process each, resumable
report      the records as a Markdown table
"""
