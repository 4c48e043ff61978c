"""The wires between processes: messages, channels, links, agreement. Knows neither side."""
