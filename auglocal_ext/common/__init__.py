"""What everything here may use, and which uses nothing of it: checks, files, devices, modules without data, bytes."""
