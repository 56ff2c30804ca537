"""Data to pictures: theme, tidy frames, plotly figures, token strips, timelines, the explorer's
widgets; nothing displays itself."""
