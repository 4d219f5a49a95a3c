"""Reports as HTML pages, Markdown and files."""
