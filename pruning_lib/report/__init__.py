"""Report: figures, the book, slides."""
