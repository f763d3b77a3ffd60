"""The demo: a real labelled H&E cohort, small enough to ship."""
