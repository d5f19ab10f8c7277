"""What is known about models, devices and clusters: facts, where they come from, and how they are read."""
