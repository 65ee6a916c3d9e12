"""Where records are kept: the protocol in ``base``, diskcache without pickle in ``disk``."""
