"""One page of HTML for a run, a comparison, or several runs."""
