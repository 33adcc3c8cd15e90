"""The report: one HTML page that says what a job did, from manifests and metrics, with the standard library alone.

`page.render` makes the page; `entries` holds what it is made of, `markup` writes HTML, `scales` and `charts` draw.
"""
