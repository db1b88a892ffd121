"""Rates a corpus and marks what to keep, on one host, on several, or on Apache Beam."""
