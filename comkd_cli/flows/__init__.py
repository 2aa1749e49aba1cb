"""What each command does, without the command line: no flow knows another, none prints."""
