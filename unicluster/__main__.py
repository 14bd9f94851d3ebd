from unicluster.cli import main

main()
