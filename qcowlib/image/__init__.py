"""What users hold: images, chains, streams, opening and creation."""
