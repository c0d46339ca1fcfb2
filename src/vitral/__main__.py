from vitral.cli import main

main()
