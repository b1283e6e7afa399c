"""The beginning of scripts that run as if this package were not installed."""

HIDE = """
import importlib.abc, json, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "picolm":
            raise ModuleNotFoundError("picolm is hidden")
sys.meta_path.insert(0, Hidden())
"""
