"""Upload and download of runs, and upload of prepared rows, on the Hugging Face Hub.

A run is a branch of a model repository. A step is a few commits on it, and the last commit of a step holds its
manifest. `picolm.store.hub` reads single files without a copy of the run.
"""
