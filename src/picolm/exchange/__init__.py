"""Runs and prepared rows to and from the Hugging Face Hub.

A run is a branch of a model repository, a step is a few commits on it, and the last commit of a step holds its manifest. What is
read file by file, without a copy of the run, is read by `picolm.store.hub`.
"""
