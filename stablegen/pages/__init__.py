"""Pages: reports as single HTML files that need no network, and the charts in them."""
