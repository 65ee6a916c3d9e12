"""Reports on a cache: an audit, one answer, the whole cache, why a request missed."""
