"""What a build would need of a machine, before there is a build."""
