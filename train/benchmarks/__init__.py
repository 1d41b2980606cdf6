"""Speed benchmarks, most of which compare implementations by timing them in turns."""
