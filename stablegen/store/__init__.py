"""Where records are kept: bytes by name (``base``), on disk or in memory, and the typed ``Cache`` above them."""
