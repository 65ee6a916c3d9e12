"""What can be said of a cache: an audit, one answer, the whole cache, why a request missed."""
