"""From plans and measurements to what people read."""
