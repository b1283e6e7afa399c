"""A suite: a matrix of runs over one base configuration, trained, analyzed and compared with one command.

Progress is read from the store, so a suite may be interrupted, extended by sizes or seeds, and started again at any
time.
"""
