"""Why a run is slow or sick: read from what it left, with the override that helps. It changes nothing in the run.

opened.py    a run's directory, read; read this first
findings.py  what is found, and how it is said
slow.py      where the time goes: data, evaluations, compilation, waiting for the GPU, padding
sick.py      losses that jump, and losses that are no numbers
rows.py      which documents, pairs or chats a step trained on, by name and text
rescore.py   which of them the loss of a step came from, by a checkpoint's weights
examine.py   all of it
"""
