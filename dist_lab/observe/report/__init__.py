"""One page that explains a run, a comparison, or several runs: README.md."""
