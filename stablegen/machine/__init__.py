"""What hardware and software is there, known without torch."""
