"""This host: directories, settings, starting processes, waiting between attempts."""
