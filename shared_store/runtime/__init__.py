"""This host: directories, settings, descriptors, starting processes, delays between attempts."""
