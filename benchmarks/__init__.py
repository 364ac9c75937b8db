"""What can be measured against published numbers, and how fast it is."""
