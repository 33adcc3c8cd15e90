"""The report: one HTML page that says what a job did, drawn from manifests and metrics. Needs only the standard library.

`page.render` makes the page; `entries` holds what it is made of, `markup` writes HTML, `scales` and `charts` draw.
"""
