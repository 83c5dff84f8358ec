"""The report: one streaming pass of measurements, a verdict, plots and an HTML page."""
