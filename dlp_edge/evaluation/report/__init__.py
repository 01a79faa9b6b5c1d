"""From results to a report: summaries, tables, plots, HTML and Markdown."""
