"""What is decided: plans and the tables they are made from."""
